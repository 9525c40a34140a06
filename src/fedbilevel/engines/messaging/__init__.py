"""Engines that send messages: `server_side` and `client_side`, the two halves; `transport`, what travels between them."""
