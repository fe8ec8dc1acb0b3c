"""What of vLLM is met: its loaders, layers, runners and its front end."""
