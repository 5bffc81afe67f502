from enum import Enum

class ModelType(Enum):
    EPS = 1
    V_PREDICTION = 2
