"""Other APIs that say what a chat says: bodies become a `ChatBody`, a choice becomes their events.

responses    OpenAI's Responses: responses_body -> chat; responses_frames
messages     Anthropic's Messages: messages_body -> chat, without what claude_code adds;
             messages_frames; messages_errors
both         contents (read alike), events (written alike)

Text and calls of tools: what asks for images or stored conversations is refused by name.
"""
