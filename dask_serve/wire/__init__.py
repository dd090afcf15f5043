"""The wire: frames, headers, payloads, authentication and the connection that carries them."""
