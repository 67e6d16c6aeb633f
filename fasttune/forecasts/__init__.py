"""What a run will need: sizes of a model, memory by part, tokens, hours, dollars."""
