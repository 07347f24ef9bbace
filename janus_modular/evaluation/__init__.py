"""Evaluation: questions with known answers, images for benchmarks, reconstruction by image tokenizers."""
