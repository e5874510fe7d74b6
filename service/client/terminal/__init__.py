"""The command line of the client: single completions, and chats."""
