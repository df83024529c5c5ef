"""Documents of text and images in turn, written by a language model.

    megamug generate RUN --prompt "..." [--image PATH]

`decoding` draws tokens, `page` shows a document as one reads it, `command` is the command.
"""
