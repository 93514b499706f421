"""Fine-tuning with TRL's SFTTrainer: exact resume, one loss whatever the micro-batch, and a stop at the first NaN."""

from farss.train.checkpoints import restore
from farss.train.record import TrainResult
from farss.train.trainer import check_options, products, training_steps, with_products
from farss.train.training import train

__all__ = ["TrainResult", "check_options", "products", "restore", "train", "training_steps", "with_products"]
