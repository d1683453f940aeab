"""How weights get to servers, one file a way: the trainer's side of vLLM's weight transfer engines."""
