"""Recorded histories as predicted time on a network."""

from .model import Goal, Prediction, advice, clients_an_exchange, predict, spent
from .network import NETWORKS, Network
