"""What stands beside a training run and uses it: forecasts, views, scores, samples, merges."""
