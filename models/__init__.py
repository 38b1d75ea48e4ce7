"""Plain PyTorch models to parallelise: each file stands alone and imports torch and the standard library only."""
