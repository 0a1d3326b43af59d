"""The optimizer's room: rules, roles -> rules, learning-rate schedules, transfer, gradient noise.

It knows the roles of weights, never a model class: who calls it hands over named tensors, each with
a `Slot` that says its role. `optimizer.py` joins the parts; a new rule or schedule is one file and
one line in its table. `transfer.py` and `noise.py` say what rates should be.
"""
