"""A trained model behind HTTP, in the form of OpenAI's API."""
