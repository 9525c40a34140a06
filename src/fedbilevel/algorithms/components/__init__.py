"""What several algorithms share.

Mathematics on pytrees: `steps` (local steps, estimates) and `directions`. Components, with client methods and a state of
their own: `curvature` (`hessian_lr="auto"`), `lower` (the lower loop), `upper` (the corrected upper round), `neumann` (the
series), `optimizer` (`outer_optimizer=`).
"""
