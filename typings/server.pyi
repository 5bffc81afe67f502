class PromptServer:
    instance: PromptServer | None
    client_id: str | None
    def send_progress_text(self, text: str, node_id: str, sid: str | None = ...) -> None: ...
