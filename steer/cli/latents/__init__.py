"""Commands about the latents of sparse autoencoders."""
