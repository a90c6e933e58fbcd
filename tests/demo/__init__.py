"""Tests of the demo room: conversion, data, training and the committed adapters."""
