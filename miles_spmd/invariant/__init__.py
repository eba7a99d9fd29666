"""What trainer and engine compute with alike, so that the log-probs of the one are, to the bit, those of the other.

Every function here is batch invariant: the result for a row (a token) depends on that row's own numbers and on nothing
else, neither on how many rows there are, nor on where it stands among them, nor on how its keys are laid out. An engine
that decodes one token at a time among strangers and a trainer that reads whole sequences packed in a stream then get
the same bits. Forward passes are shared; backward passes are the trainer's and only repeatable.
"""
