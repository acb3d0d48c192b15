"""The Compare tab: two plans or two pairs in one grid."""
