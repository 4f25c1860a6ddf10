"""What rate every parameter's step really has, whoever built the optimizer, and what is wrong with it."""

from loraplus.doctor.diagnosis import Diagnosis
from loraplus.doctor.live import doctor

__all__ = ["Diagnosis", "doctor"]
