"""What several algorithms share.

Mathematics on pytrees: `steps` (local steps, estimates), `directions`, `diagnostics`.
Components, with client methods and perhaps a state of their own: `lower` (the lower loop), `upper` (the corrected upper
rounds), `neumann` (the series), `simultaneous` (local steps on x, y and v), `tracking` (steps along an estimate), `riding`
(AggITD's turns and terms), `optimizer` (`outer_optimizer=`), `anderson` (mixing), `inner_step` (the step of training).
"""
