"""The optimizer's room: rules (AdamW, Muon), roles -> rules, and learning-rate schedules.

It knows the roles of weights, never a model class: who calls it hands over named tensors, each with
a `Slot` that says its role. `optimizer.py` joins the parts; a new rule or schedule is one file and
one line in its table.
"""
