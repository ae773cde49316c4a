"""A server that never grows: OpenAI's and Anthropic's APIs over rows of fixed size."""
