"""What tests read of the programs that jax traces."""

import jax


def arrays(jaxpr):
    """All arrays that a jaxpr makes, those of its inner jaxprs among them."""
    for equation in equations(jaxpr):
        yield from (v.aval for v in equation.outvars)


def equations(jaxpr):
    """All equations of a jaxpr, those of its inner jaxprs among them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
