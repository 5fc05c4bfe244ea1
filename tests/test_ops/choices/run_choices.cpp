// Follows commands on the standard input, a line each, and writes what they return:
//   choose KIND OURS PYTORCH MAY_MEASURE   the implementation, and how often either was timed; times in milliseconds
//   force SETTING                          ok, or refused
//   describe                               the choices
#include <iostream>
#include <string>

#include "choices.h"

int main() {
  using overlock_mm::Implementation;
  overlock_mm::Choices choices;
  std::string command;
  while (std::cin >> command) {
    if (command == "choose") {
      std::string kind;
      float ours = 0, pytorch = 0;
      bool may_measure = false;
      int timed = 0;
      std::cin >> kind >> ours >> pytorch >> may_measure;
      const Implementation chosen = choices.choose(
          kind, [&] { return may_measure; },
          [&](Implementation implementation) {
            // The first call of each takes long.
            return (++timed <= 2 ? 1000 : 1) * (implementation == Implementation::ours ? ours : pytorch);
          });
      std::cout << (chosen == Implementation::ours ? "ours " : "pytorch ") << timed << '\n';
    } else if (command == "force") {
      std::string setting;
      std::cin >> setting;
      try {
        choices.force(setting);
        std::cout << "ok\n";
      } catch (const std::invalid_argument&) {
        std::cout << "refused\n";
      }
    } else {
      std::cout << choices.describe();
    }
  }
}
