"""Operator sensitivity: when does second-order signal through attention turn into learning?"""
