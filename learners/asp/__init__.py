"""ASP: few-shot learning with prompts on a frozen vision transformer."""

from learners.asp.learner import ASP as ASP
