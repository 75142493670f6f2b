"""A language model behind an OpenAI-compatible endpoint that scores answers against references."""
