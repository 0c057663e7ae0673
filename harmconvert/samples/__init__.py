"""Networks and images that work with no hub: shipped here, or in a package from the package index."""

from __future__ import annotations

MNIST_MEAN = 0.1307
MNIST_STD = 0.3081
