"""Numbers that flags need as well as the networks; apart from them, as loading torch takes seconds."""

IMAGE_SIZE = 32                                     # the default, in pixels
# Karras et al. 2022 (2206.00364, table 1): the noise levels, for images in [-1, 1], their number and rho.
SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
NUM_TRAIN_TIMESTEPS = 1000
RHO = 7.0
