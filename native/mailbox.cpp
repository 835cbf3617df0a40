#include "mailbox.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <iterator>
#include <system_error>

#include "batcher.h"

namespace leptonic {

Mailbox::Mailbox() : event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (event_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

Mailbox::~Mailbox() { ::close(event_); }

void Mailbox::post(Mail mail) {
  std::vector<Mail> one;
  one.push_back(std::move(mail));
  post(one);
}

void Mailbox::post(std::vector<Mail>& mails) {
  bool sleeps;
  {
    std::lock_guard held(lock_);
    if (mails_.empty()) {
      mails_.swap(mails);
    } else {
      mails_.insert(mails_.end(), std::move_iterator(mails.begin()), std::move_iterator(mails.end()));
    }
    sleeps = std::exchange(asleep_, false);
  }
  mails.clear();
  if (sleeps) ring();
}

void Mailbox::ring() { eventfd_write(event_, 1); }

void Mailbox::collect(std::vector<Mail>& mails) {
  std::lock_guard held(lock_);
  mails.swap(mails_);
}

bool Mailbox::may_sleep() {
  std::lock_guard held(lock_);
  asleep_ = mails_.empty();
  return asleep_;
}

void Mailbox::awake(bool rang) {
  {
    std::lock_guard held(lock_);
    asleep_ = false;
  }
  eventfd_t ignored;
  if (rang) eventfd_read(event_, &ignored);
}

}  // namespace leptonic
