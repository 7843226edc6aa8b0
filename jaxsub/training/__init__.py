"""Training of a few numbers in place of a network's weights, many runs at once.

trainable --parametrisation--> weights {layer: array} --network (`network`)--> outputs --task--> loss
state --`steps.advance`, so many steps of all runs in one program--> state --`checkpoints`--> disk
"""
