# Steps with a limit of time, a verdict and a common log; tools/gpu_check.sh sources this.
#
# Reads $out (the folder of log.txt and verdicts.tsv), $only (names with commas, or empty for all steps) and
# $deadline (in bash's SECONDS). A verdict is one of
#   passed, FAILED, TIMEOUT   the command ended with 0, with anything else, or not in time
#   skipped                   it ended with $SKIP, was all skipped tests, or what it needs has not passed
#   left                      there was no time for it: a later call with the same --out takes it up
#   -                         it was not asked for
# and a note, which is the last line that the command printed.

SKIP=77
MARGIN=20  # seconds that a step must at least have left

verdict_of() {
  awk -F '\t' -v name="$1" '$1 == name { found = $2 } END { print found }' "$out/verdicts.tsv"
}

# record NAME VERDICT SECONDS NOTE
record() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$out/verdicts.tsv"
  printf '%-12s %-8s %5s s  %s\n' "$1" "$2" "$3" "$4"
}

# step NAME SECONDS "NAMES IT NEEDS" COMMAND...
step() {
  local name=$1 limit=$2 needs=$3 start=$SECONDS said note verdict status need
  shift 3
  steps+=("$name")
  if [ "$(verdict_of "$name")" = passed ]; then
    return 0
  fi
  for need in $needs; do
    if [ "$(verdict_of "$need")" != passed ]; then
      record "$name" skipped 0 "needs $need, which has not passed"
      return 0
    fi
  done
  if [ -n "$only" ] && [[ ",$only," != *",$name,"* ]]; then
    record "$name" - 0 "not asked for"
    return 0
  fi
  if [ $((deadline - SECONDS)) -lt $((limit < MARGIN ? limit : MARGIN)) ]; then
    record "$name" left 0 "no time left for it"
    return 0
  fi
  if [ "$limit" -gt $((deadline - SECONDS)) ]; then limit=$((deadline - SECONDS)); fi
  printf '\n==== %s, at most %s s: %s\n' "$name" "$limit" "$*" >>"$out/log.txt"
  said=$(mktemp)
  timeout --kill-after=10 "$limit" "$@" >"$said" 2>&1
  status=$?
  cat "$said" >>"$out/log.txt"
  note=$(grep -v '^[[:space:]]*$' "$said" | tail -n 1 | cut -c 1-200 | tr '\t' ' ')
  case $status in
    0) verdict=passed && [[ ! $note =~ ^[0-9]+\ skipped ]] || verdict=skipped ;;
    "$SKIP") verdict=skipped ;;
    124 | 137) verdict=TIMEOUT ;;
    *) verdict=FAILED ;;
  esac
  if [ $verdict = FAILED ] || [ $verdict = TIMEOUT ]; then
    tail -n 25 "$said" | sed 's/^/    /'
  fi
  record "$name" $verdict $((SECONDS - start)) "$note"
  rm -f "$said"
}

# The last verdict of every step, in their order. Status 0: nothing failed and nothing is left; 3: some are left.
summary() {
  local name verdict status=0
  printf '\n%-12s %-8s %7s  %s\n' step verdict seconds note
  for name in "${steps[@]}"; do
    awk -F '\t' -v name="$name" '$1 == name { line = sprintf("%-12s %-8s %7s  %s", $1, $2, $3, $4) }
      END { print line }' "$out/verdicts.tsv"
    verdict=$(verdict_of "$name")
    case $verdict in
      FAILED | TIMEOUT) status=1 ;;
      left) if [ $status -eq 0 ]; then status=3; fi ;;
    esac
  done
  return $status
}
