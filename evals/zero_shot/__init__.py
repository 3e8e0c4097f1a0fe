"""An open_clip model, trained on the drawn shapes in minutes, and what it still finds once its tower is pruned."""
