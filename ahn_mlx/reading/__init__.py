"""A model that reads a text and answers: text, template, prompt, session, memory file."""
