"""Numbers of EDM (2206.00364, table 1) that flags name as well; apart from diffusion.py, as that loads torch."""

SIGMA_MIN = 0.002                                   # noise levels, for images in [-1, 1]
SIGMA_MAX = 80.0
NUM_TRAIN_TIMESTEPS = 1000
