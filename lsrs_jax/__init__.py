"""Certified defence by latent-space randomized smoothing (LSRS) with orthogonal encoders.

A classifier is split into an encoder of orthogonal, 1-Lipschitz layers and a free head. Gaussian noise is added to
the latent between them, so that one pass of the encoder serves every noisy sample, and the radius certified in the
latent is carried back to the image by the encoder's Lipschitz constant (Zeng, Su and Huang 2021; the bound is
Cohen, Rosenfeld and Kolter 2019).

Rooms: `orthogonal` (pure functions), `layers` and `models` (Flax), `materialize` (plain kernels and their proven
Lipschitz constant), `smoothing` (votes, statistics, radii), `certification` (folders of certificates), `auditing`
(attacks), `training`, and the commands `train`, `certify`, `audit` and `report`, each run as
``python -m lsrs_jax.<command>``.
"""

from lsrs_jax import starting

__version__ = "0.1.0"

starting.begin()
