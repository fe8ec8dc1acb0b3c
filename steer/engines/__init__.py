"""Where a recipe runs, other than in plain Hugging Face code."""
