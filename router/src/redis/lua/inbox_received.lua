-- Notes the PUBREC of an entry. ARGV: 3 position. Answers 1 if there is such an entry.
local e = entry(ARGV[3])
if not e then return 0 end
local n = load()
n.touched = call('SADD', RECEIVED, ARGV[3]) == 1 or n.touched
save(n)
return 1
