"""What every form of regularization is made of; nothing here knows of the forms.

perturbation and mixing are the method: from g to g~, and from both to the regularized gradient.
options, selection and losses are what they are given: which leaves, along what, of which loss.
report is what a step tells. numerics, checks, paths and pieces serve all of them.
"""
