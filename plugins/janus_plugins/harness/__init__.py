"""Models of this project in lmms-eval; only imported by lmms-eval itself."""
