"""``cachebuilder report``: an artifact or a plan on one page that a person can look at (extra ``report``).

`facts` gathers what there is to tell, `charts` draws it with Altair, `page` writes it all into one HTML file.
"""
