"""Any model, whatever its layers: how it is called, copied, told apart, set aside and put back.

Nothing here knows of batch norm. A verb's call is one step (:mod:`~batchnorm.models.transaction`): alone on its model,
and done or not done at all::

    transaction ── claims the model ── untouched: modes, buffers, random generators ── the verb's own work
         └── on any exception: everything that was set aside is put back
"""
