"""Training of the weights that methods bring to a model, alone or together with the model's own."""

from vtprune.training.config import TrainConfig
from vtprune.training.conversations import Collator, Conversation
from vtprune.training.llava import LlavaData
from vtprune.training.run import train
from vtprune.training.shapes import ShapesData

__all__ = ["Collator", "Conversation", "LlavaData", "ShapesData", "TrainConfig", "train"]
