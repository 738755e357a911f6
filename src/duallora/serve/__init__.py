"""A server for a quick look at adapters: OpenAI's protocol and one page, on this machine."""
