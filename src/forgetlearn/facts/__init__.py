"""Read facts from a file: source -> records -> form -> drafts -> facts.

`files` and `tables` read the records of a source. `names` and `forms` recognise the form that all records share.
`readers` (with `fields`) turn each record into a draft, whose texts are unchanged. `selection` strips and checks
drafts, finds old answers and aliases, and returns a `FactSet`: the usable facts and an account of the rest.
"""

from forgetlearn.facts.fact import Fact as Fact
from forgetlearn.facts.fact import LocalityProbe as LocalityProbe
from forgetlearn.facts.fact import Probe as Probe
from forgetlearn.facts.fact import fact_id as fact_id
from forgetlearn.facts.fact import make_fact as make_fact
from forgetlearn.facts.fact import only_old as only_old
from forgetlearn.facts.fact import sha256 as sha256
from forgetlearn.facts.fact import write_facts as write_facts
from forgetlearn.facts.fact_set import NOTES as NOTES
from forgetlearn.facts.fact_set import REASONS as REASONS
from forgetlearn.facts.fact_set import WITHOUT_OLD as WITHOUT_OLD
from forgetlearn.facts.fact_set import FactSet as FactSet
from forgetlearn.facts.fact_set import GivenFacts as GivenFacts
from forgetlearn.facts.fact_set import Purpose as Purpose
from forgetlearn.facts.fact_set import as_fact_set as as_fact_set
from forgetlearn.facts.fact_set import describe_old_answers as describe_old_answers
from forgetlearn.facts.selection import from_records as from_records
from forgetlearn.facts.selection import read_facts as read_facts
from forgetlearn.facts.selection import with_old_answers as with_old_answers
