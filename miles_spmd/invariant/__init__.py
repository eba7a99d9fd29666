"""What trainer and engine compute with the same functions, so that their log-probs are bitwise equal.

Every function here is batch invariant: the result for a row (a token) depends on that row's own numbers and on nothing
else, neither on the number of rows, nor on its place among them, nor on where its keys lie in memory. So an engine that
decodes one token at a time in a batch with other requests, and a trainer that scores whole sequences packed in a
stream, compute results that are bitwise equal. Forward passes are shared; backward passes are the trainer's and only
repeatable.
"""
