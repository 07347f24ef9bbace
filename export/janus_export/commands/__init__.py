"""Commands of the command line, one file each; quick to import, what they need is imported when they run."""
