"""Several algorithms, each with several settings, in the same rounds: a race, of which the best goes on.

`playing` stops a server program at what it asks of `fed`; `racing` puts what several ask into one message; `scoring`
judges them; `heats` lets the worse ones go.
"""
