"""The data sets that ship with the library, a line each; what a task goes by stands in their own files (`Facts`)."""

# isort: off
from .embedded import DIGITS as DIGITS
from .embedded import DIABETES as DIABETES
from .embedded import BREAST_CANCER as BREAST_CANCER
from .mnist import MNIST as MNIST
from .mnist import FASHION_MNIST as FASHION_MNIST
from .heart import HEART_DISEASE as HEART_DISEASE
