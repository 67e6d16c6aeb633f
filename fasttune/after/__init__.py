"""What is done with a finished run: answers, scores, a merged model, its card."""
