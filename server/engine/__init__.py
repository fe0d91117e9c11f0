"""The engine process: from requests to tokens, in one continuous batch."""
