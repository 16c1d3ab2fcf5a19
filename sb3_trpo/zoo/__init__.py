"""RL Zoo with the algorithms of this package: importing this module registers them."""

from sb3_trpo.zoo.registration import register

register()
